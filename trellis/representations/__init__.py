"""What the decoders return: frozen dataclasses of tensors that can be rendered and saved."""
