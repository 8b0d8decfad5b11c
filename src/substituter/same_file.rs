//! Who has one NAR as one and the same file, so that it may pass as it is.
//!
//! A file cannot go on in another compression, as a NAR can. So it passes only where every known holder has this
//! very file, by its `FileHash`, or there is but one holder. Of a large NAR the other upstreams are asked, too:
//! it cannot begin anew once its first bytes are given.

use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use tokio::time::timeout;

use crate::cache::nar_name::FileHash;
use crate::codec::compression::Encoding;
use crate::nix::path_info::PathInfo;
use crate::upstream::EncodedNar;

use super::member::{Answer, Member};
use super::query;
use super::shared::Shared;

/// One holder and where it has the file.
pub(super) struct Holder {
    pub(super) member: Arc<Member>,
    pub(super) nar: EncodedNar,
}

/// Finds who has the NAR as one and the same zstd file; `None` where it must not be passed.
///
/// A part of a kept file that is gone can be made again of the same file alone: the one `wanted`.
pub(super) async fn holders(
    shared: &Shared,
    info: &PathInfo,
    known: Vec<Arc<Member>>,
    wanted: Option<FileHash>,
) -> Option<Vec<Holder>> {
    let mut holders = Vec::new();
    // Those over ssh answer without being asked, so that nothing is lost on them.
    for found in join_all(known.iter().map(|member| file_of(shared, member, info))).await {
        holders.push(found?);
    }
    if info.nar_size > shared.options.transfer.whole_bytes_max {
        // It cannot begin anew in another form: who else has it is asked before, not after.
        let setup = shared.setup();
        let ids: Vec<_> = known.iter().map(|member| member.id).collect();
        let mut others = query::ask(&setup, info.path.hash(), &ids).answers;
        let found = timeout(shared.options.transfer.others_within, async {
            let mut found = Vec::new();
            while let Some((member, answer)) = others.next().await {
                match answer {
                    Answer::Found(theirs) if theirs.nar_hash == info.nar_hash => {
                        found.push(file_of(shared, &member, info).await?);
                    }
                    _ => {}
                }
            }
            Some(found)
        });
        holders.extend(found.await.ok()??);
    }
    let first = holders.first()?;
    let hash = file_hash(&first.nar);
    let same = |holder: &Holder| file_hash(&holder.nar) == hash;
    let one_file = holders.len() == 1 || (hash.is_some() && holders.iter().all(same));
    let wanted = wanted.is_none_or(|wanted| hash == Some(wanted.0));
    (one_file && wanted).then_some(holders)
}

/// Asks one holder for its file of a NAR; `None` where that cannot be passed.
async fn file_of(shared: &Shared, member: &Arc<Member>, info: &PathInfo) -> Option<Holder> {
    let id = (info.path.hash(), member.id);
    if shared.unpassable.contains_key(&id) || shared.corrupt.contains_key(&id) {
        return None;
    }
    let within = shared.options.transfer.others_within;
    let asked = timeout(within, member.upstream.encoded_nar(info));
    let nar = asked.await.ok()?.ok()??;
    let is_served = nar.compression == Encoding::Zstd.compression();
    is_served.then(|| Holder {
        member: Arc::clone(member),
        nar,
    })
}

/// Returns the SHA-256 of a holder's file, where it is said.
pub(super) fn file_hash(nar: &EncodedNar) -> Option<[u8; 32]> {
    nar.file_hash.as_ref()?.sha256()
}
