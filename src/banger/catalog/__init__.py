"""What others have published: bundles of images and kernels, and the signed index of them.

Files on any static web server. The index is believed by its signature, a bundle by the hash that
the index names. Images and kernels themselves are their services' business.
"""
