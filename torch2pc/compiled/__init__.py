"""All that knows PyTorch's compiler."""
