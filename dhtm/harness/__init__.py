"""The experiments: data, backbones, evaluation, training, run directories and tracking."""
