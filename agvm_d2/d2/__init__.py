"""AGVM inside Detectron2: config keys, hook, trainers, loader, checkpoints, launch."""
