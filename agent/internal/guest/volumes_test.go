package guest

import (
	"os"
	"path/filepath"
	"testing"
)

func TestVolumesOfTheImageAreDirectoriesBelowTheRoot(t *testing.T) {
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "kept"), 0o700); err != nil {
		t.Fatal(err)
	}
	image := &ImageConfig{Volumes: []string{"/data/deep", "relative", "/../../climbs", "/kept"}}
	if err := makeVolumes(root, image); err != nil {
		t.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{
		"data/deep": 0o755, "relative": 0o755, "climbs": 0o755, "kept": 0o700,
	} {
		info, err := os.Stat(filepath.Join(root, path))
		if err != nil || !info.IsDir() || info.Mode().Perm() != mode {
			t.Errorf("%s: %v %v", path, info, err)
		}
	}
}

func TestAVolumeInThePlaceOfAFileIsReportedAndTheOthersAreMade(t *testing.T) {
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if makeVolumes(root, &ImageConfig{Volumes: []string{"/file", "/other"}}) == nil {
		t.Error("a file was taken for a volume")
	}
	if info, err := os.Stat(filepath.Join(root, "other")); err != nil || !info.IsDir() {
		t.Error(err)
	}
	if err := makeVolumes(root, nil); err != nil {
		t.Error(err)
	}
}
