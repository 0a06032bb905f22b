"""Speed against named peers, both measured in one run; nothing here is a test."""
