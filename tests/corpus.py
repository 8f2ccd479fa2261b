"""Small bilingual texts for tests, recombined by a seed."""

from __future__ import annotations

import random

ENGLISH = [
    "The river carries cold water from the mountains to the sea.",
    "A teacher explains why the moon changes its shape every month.",
    "Farmers plant rice in spring and harvest it in autumn.",
    "Computers store numbers as sequences of zeros and ones.",
    "The old library keeps thousands of maps, letters and 1,250 diaries.",
    "Bees visit flowers, collect nectar and turn it into honey.",
    "Trains between the two cities run every 30 minutes.",
    "She said: \"It's raining; let's wait until 5 o'clock.\"",
    "Sound travels faster through water than through air.",
    "def area(width, height):\n    return width * height\n",
    "Many islands were formed by volcanoes long ago.",
    "The museum opens at nine and closes at six, except on Mondays.",
]

CHINESE = [
    "长江是中国最长的河流，全长约六千三百公里。",
    "人工智能正在改变我们学习和工作的方式。",
    "春天播种水稻，秋天收获粮食。",
    "图书馆里保存着古老的地图和书信。",
    "月亮的形状每个月都会发生变化。",
    "北京是中华人民共和国的首都。",
    "蜜蜂采集花蜜，酿成蜂蜜。",
    "计算机用零和一表示数字与文字。",
    "高速铁路连接了许多城市，出行更加方便。",
    "太阳从东方升起，在西方落下。",
    "大学的研究人员发表了关于气候变化的报告。",
    "学习语言需要耐心和练习。",
]


def sample_texts(count: int, seed: int = 0, max_sentences: int = 6, chinese: bool = True) -> list[str]:
    """`count` texts of one to `max_sentences` sentences each; the same for the same seed."""
    generator = random.Random(seed)
    texts = []
    for _ in range(count):
        language = CHINESE if chinese and generator.random() < 0.5 else ENGLISH
        sentences = [generator.choice(language) for _ in range(generator.randint(1, max_sentences))]
        texts.append(("" if language is CHINESE else " ").join(sentences))
    return texts
