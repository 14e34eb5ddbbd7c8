"""Log formats: headers, files, splits and parsing; conversions and statistics of whole logs."""
