"""Language models: Llama-like bases, LoRA adapters, weights and tokenizers as the field's files hold them."""
