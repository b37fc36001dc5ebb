"""EvoMoE on megatron-core: dense LLaVA-style models into sparse mixtures of experts."""

__version__ = "0.1.0"
