"""The tests, as a package: textstat installs one of the same name, which would hide a folder that is none."""
