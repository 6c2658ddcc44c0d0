BEGIN TRANSACTION;
CREATE TABLE vms (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    address TEXT UNIQUE,
    record TEXT NOT NULL
) STRICT;
INSERT INTO "vms" VALUES('0123456789abcdef0123456789abcdef','web','172.16.0.2','{"id":"0123456789abcdef0123456789abcdef","name":"web","state":"stopped","image_id":"11111111111111111111111111111111","image":"debian","kernel":"debian-6.12-cloud","vcpu":1,"memory_mib":512,"overlay_bytes":8589934592,"work_disk_bytes":8589934592,"address":"172.16.0.2","mac":"06:00:ac:10:00:02","network":"bridge","nat":false,"ephemeral":false,"owner":null,"provisional":false,"vmm":"firecracker","boot_id":null,"workspace":null,"bootstrap":null,"files_synced":false,"last_error":null,"created_at":"2026-11-28T08:00:00.000Z","updated_at":"2026-11-28T08:00:00.000Z","touched_at":"2026-11-28T08:00:00.000Z"}');
COMMIT;
PRAGMA user_version = 1;
