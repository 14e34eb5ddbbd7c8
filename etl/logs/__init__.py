"""Log formats: headers, byte ranges and parsing."""
