"""The claims that a study can test, what they are tested on, and how they are judged."""
