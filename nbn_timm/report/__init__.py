"""A page of what a run has come to, and a page that compares several."""
from nbn_timm.report.comparison import write_comparison
from nbn_timm.report.norms import NormSizes, norm_sizes
from nbn_timm.report.run import FinishedRun, find_checkpoint, is_run, of_its_weights, read_run
from nbn_timm.report.single import write_report

__all__ = ['FinishedRun', 'NormSizes', 'find_checkpoint', 'is_run', 'norm_sizes', 'of_its_weights', 'read_run',
           'write_comparison', 'write_report']
