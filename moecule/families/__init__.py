"""One file a model family; the file name is the model_type of config.json."""
