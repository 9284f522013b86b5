//! `tidepool image`.

use tidepool_proto::api::{ImageInfo, ImportImage};

use crate::cli::{ImageCommand, ImportArgs};
use crate::client::{Client, path};
use crate::failure::Failure;
use crate::human;
use crate::ui::{Ui, flexible, left, right, table};

pub(crate) async fn run(command: ImageCommand, client: &Client, ui: Ui) -> Result<(), Failure> {
    match command {
        ImageCommand::Import(args) => import(args, client, ui).await,
        ImageCommand::List => list(client, ui).await,
    }
}

async fn import(args: ImportArgs, client: &Client, ui: Ui) -> Result<(), Failure> {
    // The daemon has another working directory.
    let source = std::path::absolute(&args.source).map_err(|e| {
        Failure::usage(format!(
            "cannot make {} absolute: {e}",
            args.source.display()
        ))
    })?;
    let source = source
        .to_str()
        .ok_or_else(|| Failure::usage(format!("{} is not valid UTF-8", source.display())))?;
    let request = ImportImage {
        name: args.name,
        source: source.to_owned(),
        kind: args.kind.map(Into::into),
    };
    let image: ImageInfo = client.events(&path(&["images"]), Some(&request)).await?;
    ui.result(&image, || {
        format!(
            "imported {}: {}, {}; {} sent to the store",
            human::clean(&image.name),
            human::count(image.files, "file", "files"),
            human::size(image.bytes),
            human::size(image.sent_bytes),
        )
    })
}

async fn list(client: &Client, ui: Ui) -> Result<(), Failure> {
    let images: Vec<ImageInfo> = client.get(&path(&["images"])).await?;
    ui.result(&images, || {
        let columns = [
            flexible("NAME"),
            left("TREE"),
            left("DOMAIN"),
            right("FILES"),
            right("SIZE"),
            left("CREATED"),
        ];
        let row = |i: &ImageInfo| {
            vec![
                human::clean(&i.name),
                i.tree.short(),
                i.domain.to_string(),
                i.files.to_string(),
                human::size(i.bytes),
                human::time(i.created_ms),
            ]
        };
        table(&columns, images.iter().map(row).collect())
    })
}
