package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// makeVolumes makes the directories that the image declares as volumes: what other tools would
// mount there is, in a machine of its own, a directory like any other. One that is there is kept.
func makeVolumes(root string, image *ImageConfig) error {
	if image == nil {
		return nil
	}
	var errs []error
	for _, volume := range image.Volumes {
		if err := os.MkdirAll(filepath.Join(root, filepath.Clean("/"+volume)), 0o755); err != nil {
			errs = append(errs, fmt.Errorf("making the image's volume %s: %w", volume, err))
		}
	}
	return errors.Join(errs...)
}
