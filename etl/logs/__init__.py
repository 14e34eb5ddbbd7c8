"""Log formats: headers, byte ranges, parsing."""
