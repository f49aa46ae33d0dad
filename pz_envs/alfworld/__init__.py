"""ALFWorld: household tasks in text, from the published game files, in a native engine."""
