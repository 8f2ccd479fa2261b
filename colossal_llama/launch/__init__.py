"""Launching on one host or many: the hostfile, the environment, the pre-flight check, supervision."""
