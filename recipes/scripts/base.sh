# Runs in the fresh root, before it becomes an image. For every recipe.

# Root is who works in a guest. Its password stays "*": none fits. Not locked ("!"), since sshd then
# refuses keys as well where it does without PAM.
usermod --shell /bin/bash --password '*' root

# Banger's own drop-in comes first only where sshd_config reads drop-ins first.
if [ -f /etc/ssh/sshd_config ]; then
    grep -q '^Include /etc/ssh/sshd_config.d/\*.conf' /etc/ssh/sshd_config
    mkdir -p /etc/ssh/sshd_config.d
fi

# Devices that the image knows nothing of would only delay the boot.
: > /etc/fstab
: > /etc/machine-id
