"""From a trained network to files that run elsewhere: folding, formats, their verification and timing."""
from .check_images import CheckImages, folder_images, generated_images, training_data_images
from .exporter import ExportedFile, ExportReport, ExportSettings, export_model
from .fold import NOTHING_TO_FOLD, FoldSettings, Preprocessed, deployed, foldable
from .formats import FORMATS, INT8_FORMATS, Artefact, Format
from .int8_data import Int8Data, Int8Settings, int8_data
from .timing import Timing, interleaved

__all__ = [
    'FORMATS', 'INT8_FORMATS', 'NOTHING_TO_FOLD', 'Artefact', 'CheckImages', 'ExportReport', 'ExportSettings',
    'ExportedFile', 'FoldSettings', 'Format', 'Int8Data', 'Int8Settings', 'Preprocessed', 'Timing', 'deployed',
    'export_model', 'foldable', 'folder_images', 'generated_images', 'int8_data', 'interleaved', 'training_data_images',
]
