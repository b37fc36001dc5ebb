"""The LLaVA model, made of megatron-core's layers."""
