"""Updates as folders ``weight_v000001``, the format on disk of slime, miles and stitch."""
