"""Frechet distance between two Gaussians: how far two sets of features are apart in mean and covariance.

    d^2 = |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2)

With Inception features it is called FID; with any other features it must be given another name.
"""

import numpy as np


def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared 2-Wasserstein distance of N(mu1, cov1) and N(mu2, cov2), in squared feature units (G09).

    mu (D,), cov (D, D), symmetric positive semidefinite, on the host. The trace of the matrix root is the sum of the
    roots of the eigenvalues of C_1^1/2 C_2 C_1^1/2, which stays real for singular covariances. ValueError on
    shapes that don't match.
    """
    mu1, cov1, mu2, cov2 = (np.asarray(a, dtype=np.float64) for a in (mu1, cov1, mu2, cov2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not cov1.shape == cov2.shape == 2 * mu1.shape:
        raise ValueError(f"frechet_distance: need two means (D,) and two covariances (D, D), got {mu1.shape}, "
                         f"{cov1.shape}, {mu2.shape}, {cov2.shape}")
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    return float(((mu1 - mu2)**2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)
