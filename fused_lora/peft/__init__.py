"""PEFT support: fused forwards for PEFT's LoRA layers, and PEFT's adapter files."""
