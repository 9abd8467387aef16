"""Which of several models another one descends from: samples, measures, and what they say together."""
