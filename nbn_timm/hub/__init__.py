"""Trained models for the Hugging Face Hub: a folder in timm's format, its model card, and the way there."""
from nbn_timm.hub.card import model_card
from nbn_timm.hub.folder import portable, write_folder
from nbn_timm.hub.push import push_files
from nbn_timm.hub.record import public_record, results_beside, results_of, summarize_results

__all__ = ['model_card', 'portable', 'public_record', 'push_files', 'results_beside', 'results_of',
           'summarize_results', 'write_folder']
