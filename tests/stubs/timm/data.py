"""Names that transformers imports from timm.data."""


class ImageNetInfo:
    """Not asked for anything."""


def infer_imagenet_subset(_config):
    """No labels."""
    return None
