"""Many tensors in one buffer, so that an update is one call and not one a tensor."""
