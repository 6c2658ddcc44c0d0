"""Room: registries, archives and layers of container images, up to one merged tar stream.

`reference` says which image is meant, `registry`, `layout` and `docker_archive` give its documents
and layers, `blobs` keeps what came over the network, `merge` lays the layers over each other.
Nothing of an image is ever unpacked on the host.
"""
