"""From a trained network to files that run elsewhere: folding, formats, their verification and timing."""
from .check_images import CheckImages, folder_images, generated_images, training_data_images
from .exporter import ExportedFile, ExportReport, ExportSettings, export_model
from .fold import NOTHING_TO_FOLD, FoldSettings, Preprocessed, deployed, foldable
from .formats import FORMATS, Artefact, Format
from .timing import Timing, interleaved

__all__ = [
    'FORMATS', 'NOTHING_TO_FOLD', 'Artefact', 'CheckImages', 'ExportReport', 'ExportSettings', 'ExportedFile',
    'FoldSettings', 'Format', 'Preprocessed', 'Timing', 'deployed', 'export_model', 'foldable', 'folder_images',
    'generated_images', 'interleaved', 'training_data_images',
]
