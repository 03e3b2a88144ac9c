__version__ = "0.1.0"


def __getattr__(name):
    "`glcm.load`, imported only when it is asked for: it brings PyTorch along."
    if name == 'load':
        from .export import load
        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
