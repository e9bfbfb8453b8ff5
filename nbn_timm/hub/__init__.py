"""Trained models for the Hugging Face Hub: a folder in timm's format, its model card, and the way there."""
from nbn_timm.hub.card import model_card
from nbn_timm.hub.folder import FOLDER_FILES, portable, write_model_folder
from nbn_timm.hub.upload import check_destination, push_files

__all__ = ['FOLDER_FILES', 'check_destination', 'model_card', 'portable', 'push_files', 'write_model_folder']
