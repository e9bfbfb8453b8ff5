"""On what is computed, and how precisely."""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nbn_timm.errors import InputError, nearest
from nbn_timm.key_values import reason_of
from nbn_timm.settings import Settings, only_with, setting

# What a processor must be able to do for bfloat16 to be faster than float32, by torch's names.
_BFLOAT16 = ('AVX512', 'AMX', 'SVE')


def has_bfloat16() -> bool:
    """Whether this processor is faster with bfloat16 than with float32."""
    return torch.backends.cpu.get_cpu_capability().startswith(_BFLOAT16)


@dataclass(frozen=True)
class PrecisionSettings(Settings):
    """On what is computed, and how precisely."""

    title = 'precision and devices'

    device: str | None = setting(None, "cpu, cuda, cuda:1, ...", metavar='NAME', kind='machine',
                                 unset='a GPU if there is one')
    amp: bool = setting(False, 'autocast')
    amp_dtype: str = setting('float16', 'of autocast', choices=('float16', 'bfloat16'), effect=only_with('amp'))
    model_dtype: str | None = setting(
        None, 'type of weights and images without --amp: half the memory', unset='float32',
        choices=('float32', 'bfloat16', 'float16'))
    channels_last: bool = setting(False, 'memory format of images and weights')
    torchcompile: str | None = setting(None, 'compile the model', nargs='?', const='inductor', metavar='BACKEND')

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.amp and self.dtype is not None:
            raise InputError(f'--amp keeps weights in float32 and --model-dtype {self.model_dtype} does not: leave one '
                             'out')

    @property
    def name(self) -> str:
        """Of the precision, for records."""
        return self.amp_dtype if self.amp else self.model_dtype or 'float32'

    @property
    def dtype(self) -> torch.dtype | None:
        """Of weights and images; None for float32."""
        return None if self.model_dtype in (None, 'float32') else getattr(torch, str(self.model_dtype))

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Surround what runs a compiled model, and say so where there is no such backend or it fails.

        It may lack a compiler or a package, or not know this device. A fault of the model itself comes again without
        --torchcompile, as it is.

        Raises:
            InputError: The backend is not there, or has failed.
        """
        if not self.torchcompile:
            yield
            return
        known = torch.compiler.list_backends(exclude_tags=None)  # type: ignore[arg-type]
        if self.torchcompile not in known:
            raise InputError(f"there is no backend '{self.torchcompile}' for --torchcompile (usual are "
                             f"{', '.join(torch.compiler.list_backends())}){nearest(self.torchcompile, known)}")
        from torch._dynamo.exc import BackendCompilerFailed  # takes a second
        try:
            yield
        except BackendCompilerFailed as error:
            raise InputError(f'--torchcompile {self.torchcompile} cannot compile this model here ({reason_of(error)}): '
                             'leave it out, or give another backend') from error

    def advice(self, device: torch.device) -> str | None:
        """What would make the computation faster on this machine, in a sentence; None if nothing is known."""
        capability = torch.backends.cpu.get_cpu_capability()
        if device.type == 'cpu' and self.autocast is not None and not has_bfloat16():
            return (f'This processor ({capability}) has no arithmetic for {self.amp_dtype}, which is many times slower '
                    'here than float32: leave out --amp.')
        return None

    @property
    def autocast(self) -> torch.dtype | None:
        """The type of autocast, None without."""
        return getattr(torch, self.amp_dtype) if self.amp else None
