"""Divides held-out text into validation, which may be looked at during training, and test, which may not.

Records are taken in an order that only their text decides. Licences are those of the corpora.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--held_out_dir", type=Path, required=True, help="has LANGUAGE/*.jsonl")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="gets validation/LANGUAGE and test/LANGUAGE"
    )
    parser.add_argument("--validation_bytes", type=int, default=16_000, help="text of each language, at most")
    parser.add_argument("--test_bytes", type=int, default=60_000, help="text of each language, at most")
    args = parser.parse_args()
    for directory in sorted(path for path in args.held_out_dir.iterdir() if path.is_dir()):
        records = [
            json.loads(line)
            for path in sorted(directory.glob("*.jsonl"))
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        records.sort(key=lambda record: hashlib.sha256(record["target"].encode()).digest())
        validation, rest = take(records, args.validation_bytes)
        test, _ = take(rest, args.test_bytes)
        for name, part in (("validation", validation), ("test", test)):
            target = args.output_dir / name / directory.name
            target.mkdir(parents=True, exist_ok=True)
            with open(target / "sections.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in part)
            print(f"{target}: {len(part):,} sections, {size_of(part):,} bytes")


def take(records: list[dict[str, str]], num_bytes: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Records from the front whose text fits the bytes, and the others."""
    taken, rest, used = [], [], 0
    for record in records:
        size = len(record["target"].encode())
        if used + size <= num_bytes:
            taken.append(record)
            used += size
        else:
            rest.append(record)
    return taken, rest


def size_of(records: list[dict[str, str]]) -> int:
    return sum(len(record["target"].encode()) for record in records)


if __name__ == "__main__":
    main()
