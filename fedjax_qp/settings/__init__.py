"""What a setting may be: types of values, strict YAML and JSON, and the names that a configuration can use."""
