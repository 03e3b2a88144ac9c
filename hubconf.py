"""Models for `torch.hub`: `model, config = torch.hub.load(FOLDER OF THIS REPOSITORY, 'glcm', source='local')`."""
dependencies = ['torch', 'safetensors', 'pandas', 'pydantic']


def glcm(
    weights=None, # a bundle, a checkpoint, or owner/model on the Hugging Face hub; None: those that come with the package
):
    "A pretrained model, ready for evaluation, and the configuration it was trained with."
    from glcm.export import load
    return load(weights)
