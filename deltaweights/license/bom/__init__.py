"""Bills of materials for platforms that read CycloneDX or SPDX, each written by the format's own library."""
