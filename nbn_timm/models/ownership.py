"""Which architectures are this package's own."""
from timm.models import is_model, model_entrypoint

__all__ = ['needs_package']


def needs_package(architecture: str) -> bool:
    """Whether an architecture is this package's, so that loading it takes `import nbn_timm`."""
    name = architecture.partition('.')[0]
    return is_model(name) and model_entrypoint(name).__module__.startswith('nbn_timm.')
