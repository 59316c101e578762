"""Every model of the project against textgen.testing.GeneratorTests: a file for each kind. Names of tests elsewhere may be the same."""
