"""Base and adapter as one model, tensor by tensor, block by block."""
