//! Images: imported once into the store as a tree, unpacked once a host as the lower layer of its sandboxes.
//!
//! An unpacked image is a directory named by its tree, made under a temporary name and renamed when it is complete; nothing in it is changed after.
//!
//! Elsewhere on purpose: reading tars and OCI layouts (`tidepool_fs::images`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidepool_fs::TreeKind;
use tidepool_fs::images::{self as import, ImageError, ImportLimits};
use tidepool_proto::api::{ImageInfo, ImportImage};
use tidepool_proto::ids::valid_label;
use tidepool_proto::{ChunkName, ErrorKind, SessionId, TreeId};

use crate::error::{Context, HostError, Result, chain};
use crate::host::{Host, now_ms};
use crate::http::Reporter;
use crate::record::{SandboxRecord, remove_tree};
use crate::transfer::{PIN_AGAIN, Uploaded};

/// Whether `name` may name an image: a label, and perhaps `:` and another.
fn valid_name(name: &str) -> bool {
    let (label, tag) = name.split_once(':').unwrap_or((name, "latest"));
    valid_label(label, 100) && valid_label(tag, 27)
}

impl Host {
    /// All imported images.
    pub async fn images(&self) -> Result<Vec<ImageInfo>> {
        let records = self.transfer.client.images().await?;
        records
            .iter()
            .map(|(name, bytes)| decode(name, bytes))
            .collect()
    }

    /// The image of this name.
    pub async fn image(&self, name: &str) -> Result<ImageInfo> {
        match self.transfer.client.image(name).await? {
            Some(bytes) => decode(name, &bytes),
            None => Err(HostError::not_found(format!(
                "there is no image {name:?}; `tidepool image list` shows those there are"
            ))),
        }
    }

    /// Imports an image; the same content under the same name again is no error and sends nothing.
    pub async fn import_image(
        self: Arc<Self>,
        request: ImportImage,
        report: Reporter,
    ) -> Result<ImageInfo> {
        if !valid_name(&request.name) {
            return Err(HostError::invalid(format!(
                "{:?} cannot name an image: letters, digits and . _ -, then perhaps :tag",
                request.name
            )));
        }
        let source = PathBuf::from(&request.source);
        if !source.is_absolute() {
            return Err(HostError::invalid(format!(
                "{:?} is not an absolute path",
                request.source
            )));
        }
        if !source.exists() {
            return Err(HostError::not_found(format!(
                "{} does not exist on this host",
                source.display()
            )));
        }
        let _one_at_a_time = self.importing.lock().await;
        let existing = self.transfer.client.image(&request.name).await?;
        let staging = self
            .state
            .images()
            .join(format!("import-{}", hex::encode(rand::random::<[u8; 8]>())));
        std::fs::create_dir(&staging).context(format!("making {}", staging.display()))?;
        let staged = Staging(staging);
        let root = staged.0.join("rootfs");
        let upload = self.transfer.upload();
        let mut sink = upload.sink();
        let (kind, key, at) = (request.kind, self.transfer.key.clone(), root.clone());
        let told = report.clone();
        let imported = tokio::task::spawn_blocking(move || {
            let mut progress = |stage: &str, done, total| told.progress(stage, done, total);
            let limits = ImportLimits::default();
            import::import(&source, kind, &at, &key, limits, &mut sink, &mut progress)
        })
        .await?;
        // The upload's own error, where there is one, is the cause of the reader's.
        let Uploaded {
            session,
            sent,
            names,
        } = upload.finish().await?;
        let imported = imported.map_err(|e| {
            HostError::new(
                import_kind(&e),
                format!("importing {}: {}", request.source, chain(&e)),
            )
        })?;
        for note in &imported.notes {
            tracing::warn!(image = request.name, "{note}");
        }
        let info = ImageInfo {
            name: request.name.clone(),
            tree: imported.tree,
            domain: self.domain.clone(),
            bytes: imported.bytes,
            files: imported.files,
            sent_bytes: sent.bytes,
            created_ms: now_ms(),
            env: imported.env,
            cwd: imported.cwd,
        };
        if let Some(bytes) = existing {
            let there = decode(&request.name, &bytes)?;
            self.end_session(session).await?;
            if there.tree != info.tree {
                return Err(HostError::conflict(format!(
                    "image {} exists with other content; import under another name",
                    request.name
                )));
            }
            return Ok(ImageInfo {
                sent_bytes: sent.bytes,
                ..there
            });
        }
        let place = self.image_dir(info.tree);
        if !place.exists() {
            std::fs::rename(&staged.0, &place).context("placing the unpacked image")?;
        }
        let record = serde_json::to_vec(&info).expect("an image has only text keys");
        let mut round = sent.round;
        let mut tries = 0;
        loop {
            let roots = [ChunkName(info.tree.0)];
            let client = &self.transfer.client;
            match client
                .put_image(&request.name, record.clone(), &roots, round)
                .await
            {
                Ok(()) => break,
                Err(e) if e.upload_again() && tries < PIN_AGAIN => {
                    tracing::info!(error = %e, "a collection began: pinning again");
                }
                Err(e) => return Err(e.into()),
            }
            let (fresh, now) = self.transfer.pin_again(&names).await?;
            self.end_session(Some(fresh)).await?;
            round = now;
            tries += 1;
        }
        self.end_session(session).await?;
        Ok(info)
    }

    /// The round in which the image of a sandbox was seen to be there.
    pub(crate) async fn image_round(&self, record: &SandboxRecord) -> Result<u64> {
        let found = self.transfer.client.image_at(&record.image_name).await?;
        match found {
            Some((bytes, round)) if decode(&record.image_name, &bytes)?.tree == record.image => {
                Ok(round)
            }
            _ => Err(HostError::not_found(format!(
                "the image {} that sandbox {} was made from is not there any more",
                record.image_name, record.name
            ))),
        }
    }

    async fn end_session(&self, session: Option<SessionId>) -> Result<()> {
        match session {
            Some(session) => Ok(self.transfer.client.end_session(session).await?),
            None => Ok(()),
        }
    }

    fn image_dir(&self, tree: TreeId) -> PathBuf {
        self.state.images().join(tree.to_string())
    }

    /// The image's unpacked root on this host; fetched from the store where it is not there yet.
    pub async fn image_root(&self, tree: TreeId, report: &Reporter) -> Result<PathBuf> {
        let place = self.image_dir(tree);
        let root = place.join("rootfs");
        if root.exists() {
            return Ok(root);
        }
        let _one_at_a_time = self.importing.lock().await;
        if root.exists() {
            return Ok(root);
        }
        report.progress("fetching the image", 0, None);
        let staged = Staging(
            self.state
                .images()
                .join(format!("fetch-{}", hex::encode(rand::random::<[u8; 8]>()))),
        );
        std::fs::create_dir(&staged.0).context("making a directory for the image")?;
        self.materialise(tree, &staged.0.join("rootfs"), TreeKind::Image)
            .await
            .context("fetching the image")?;
        std::fs::rename(&staged.0, &place).context("placing the image")?;
        Ok(root)
    }

    /// Removes what imports and fetches that were cut short left behind.
    pub fn sweep_images(&self) -> Result<()> {
        let dir = self.state.images();
        for entry in std::fs::read_dir(&dir).context(format!("reading {}", dir.display()))? {
            let entry = entry.context("reading the images")?;
            let name = entry.file_name();
            if [&b"import-"[..], b"fetch-"]
                .iter()
                .any(|p| name.as_encoded_bytes().starts_with(p))
            {
                remove_tree(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// What a failed import means to its caller.
fn import_kind(e: &ImageError) -> ErrorKind {
    match e {
        e if e.is_invalid() => ErrorKind::Invalid,
        ImageError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
            ErrorKind::Unavailable
        }
        _ => ErrorKind::Failed,
    }
}

fn decode(name: &str, bytes: &[u8]) -> Result<ImageInfo> {
    serde_json::from_slice(bytes).map_err(|e| {
        HostError::new(
            ErrorKind::Corruption,
            format!("the record of image {name} cannot be read: {e}"),
        )
    })
}

/// A directory that is removed unless it was renamed away.
struct Staging(PathBuf);

impl Drop for Staging {
    fn drop(&mut self) {
        let path: &Path = &self.0;
        if let Err(e) = remove_tree(path) {
            tracing::warn!(path = %path.display(), error = %e, "an unfinished image is left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_names_may_carry_one_tag() {
        for good in ["debian", "debian:12", "a.b-c_d:x"] {
            assert!(valid_name(good), "{good}");
        }
        for bad in ["", ":", "a:", "a:b:c", "a/b", "../a", "a b"] {
            assert!(!valid_name(bad), "{bad}");
        }
    }
}
