"""LightningModules: any Hugging Face causal language model, and small reference models."""
