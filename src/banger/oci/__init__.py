"""Room: registries, archives and layers of container images, up to one merged tar stream."""
