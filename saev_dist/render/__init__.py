"""PURE. Pictures: arrays in, RGB arrays out. No files, environment, logging or collectives."""
