"""What a trained encoder is worth: cached features, probes on them, and measures of collapse."""
