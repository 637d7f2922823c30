"""The objects that the verbs print with `--json`: their version, and all their fields.

Each verb has a model that names its fields. The tests hold what the verbs print against it, and README.md is made from
it (`make docs`): so no field is printed that the page does not explain.
"""

# Rises if a field goes, or changes its name, type or meaning. A new field does not raise it.
SCHEMA_VERSION = 1
