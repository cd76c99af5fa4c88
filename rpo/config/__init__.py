"""Settings: classes that check themselves, ranges, and the YAML that fills them."""
