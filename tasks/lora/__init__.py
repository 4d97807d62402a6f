"""The engine: a frozen base model, LoRAs on it, a bank of them, merging, training, generation.

Needs torch, transformers, peft and safetensors only; knows no orchestrator, no tracker, no
benchmark. Shapes by letters: K anchors, B samples, T tokens, V vocabulary, d hidden, r rank.
"""
