"""Engines that batch by themselves, in place of transformers' forward passes."""
