"""Continual pre-training and supervised fine-tuning of LLaMA on ColossalAI."""
