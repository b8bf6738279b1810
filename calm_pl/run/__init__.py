"""A run on the command line: Lightning's CLI over composed configurations, its folder, its folds, its W&B page."""
